"""The methods beside PatchCore, each a detector of its own, and one way to load the model of any."""
