"""What runs around the guard: containers, monitoring and its dashboards."""
