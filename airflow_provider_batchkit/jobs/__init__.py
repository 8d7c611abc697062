"""The use cases, without Airflow: submit a job, settle what is in doubt, fetch, and keep to the caps."""
