"""What to label next: scores of unlabelled cases, and strategies that choose by them. Nothing here knows a server."""
