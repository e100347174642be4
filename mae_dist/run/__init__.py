"""What lies in the folder of a run, who writes it, and how a line of it is read."""
