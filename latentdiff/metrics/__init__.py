"""How good a picture is, in numbers."""
