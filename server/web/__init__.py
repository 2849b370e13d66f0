"""HTTP as the handlers see it: requests, responses, problems. Knows ASGI, and no endpoint."""
