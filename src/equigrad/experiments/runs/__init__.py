"""Shared by all experiments: settings, run directories, saved models, figures, reports."""
