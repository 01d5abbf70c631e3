"""Do measures of latents tell error correctors from features? Each module is a program."""
