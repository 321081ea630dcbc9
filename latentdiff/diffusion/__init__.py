"""The mathematics of diffusion, with no model in sight: process, timetable, denoiser, loop."""
