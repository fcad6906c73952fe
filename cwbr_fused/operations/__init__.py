"""What both forms stand on: the operations, their definitions and their backends."""
