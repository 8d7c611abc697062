"""The Batches page: an Airflow plugin with a React component and the JSON routes that it reads."""
