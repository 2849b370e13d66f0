"""Who is asking: the credential of a request, the token's signature and claims, the keys.

Nothing here knows users, channels or subscriptions of the database by itself, and nothing here
logs or raises any part of a credential.
"""
