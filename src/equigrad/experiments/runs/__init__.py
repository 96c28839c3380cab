"""Shared parts of all experiments: settings, run directories, saved models, figures, reports."""
