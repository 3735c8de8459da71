"""What people look at: the HTML report, charts and heat maps."""
