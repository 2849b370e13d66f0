"""The ASGI application and the process around it."""
