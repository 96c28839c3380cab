"""Regularisation strengths learned for every weight, on images and on data of your own."""
