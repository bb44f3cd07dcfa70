"""From a trained model and an image to a mask on the image's own grid."""
