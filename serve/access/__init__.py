"""Who may ask: keys at the door, tenants, the principal of a request."""
