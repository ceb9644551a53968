"""How far stored targets are from the teacher: certificate and bound."""
