"""Explorers for JupyterLab: ipywidgets around live panels, with the same views as plain figures."""
