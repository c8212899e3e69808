"""The training program: runs from the repository root, not installed with the package."""
