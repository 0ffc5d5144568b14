"""What the speed tables measure, and how."""
