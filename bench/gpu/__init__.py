"""What this project does on a GPU, shown and measured in minutes: see docs/gpu.md."""
