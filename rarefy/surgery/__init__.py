"""One model into another: edits of shape with a record that a loader replays; recovery of what pruning lost."""
