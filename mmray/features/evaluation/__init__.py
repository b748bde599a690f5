"""What an edit did: before and after, each number with its protocol, its n and its interval."""
