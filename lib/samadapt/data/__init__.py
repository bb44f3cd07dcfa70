"""From files on disk to what a 2D model sees, and back onto the native grid."""
