"""What refines results without training: thresholds by Otsu's rule, a dense CRF, test-time augmentation."""
