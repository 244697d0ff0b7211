"""From loss to accuracy."""
