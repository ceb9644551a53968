"""The sum over covers, and which histories it lacks."""
