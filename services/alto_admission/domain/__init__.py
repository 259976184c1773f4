"""What admission decides, without I/O: states, the story that reports tell, what a request may ask for, its size."""
