"""A server for pictures: OpenAI's and A1111's HTTP calls, jobs with progress, and a page."""
