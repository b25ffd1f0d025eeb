"""What it cost: figures about one model or several, measured or modelled."""
