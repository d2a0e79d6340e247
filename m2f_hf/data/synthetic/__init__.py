"""Generated scenes and clips with exact annotations."""
