"""Pictures with captions: reading folders of them, building one, caching what a model makes of them."""
