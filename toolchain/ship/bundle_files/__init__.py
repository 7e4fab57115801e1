"""Files and templates that go into bundles; an app developer can run them without this package."""
