"""What all experiments share: settings, run folders, saved models, figures, reports."""
