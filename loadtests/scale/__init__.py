"""What a second replica, data-parallel rank or tensor-parallel rank brings, guarded and not."""
