"""What a run is: its recipe, its place on the hardware, its directory, its processes, its reports."""
