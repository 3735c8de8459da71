"""Images: which files and objects are images, and how they become pixels. The only room that uses Pillow."""
