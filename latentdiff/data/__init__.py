"""Pictures with captions: folders of them, the emoji builder, cached latents."""
