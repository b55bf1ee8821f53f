"""The measurements that the documentation states; README.md says which script writes what."""
