"""What every room uses: records, roles, exact selection, discovery. Imports nothing else of ours."""
