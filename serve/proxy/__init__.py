"""What runs inside Ray Serve's own HTTP proxy."""
