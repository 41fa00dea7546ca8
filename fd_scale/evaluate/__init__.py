"""What was gained? One task per file; whatever is measured is seen through ``backbone.Backbone`` alone."""
