"""Data files of the package: the 172 papers, the evidence that tests wrote, the generated catalogue."""
