from fake_process import router

router()
