"""Files and templates from which `ship` makes a bundle. The scripts run without this package."""
