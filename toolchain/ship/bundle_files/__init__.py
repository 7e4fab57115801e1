"""Files that go into bundles as they are: what an app developer runs needs nothing of this package."""
