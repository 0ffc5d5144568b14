"""What every command begins with: its flags, presets and packages, and the folder that a run leaves."""
