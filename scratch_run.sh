export PYTHONPATH=/tmp/site:$PWD
(CUDA_VISIBLE_DEVICES= taskset -c 4-15 timeout 100 python3 -m pytest -q -n 11 -p no:cacheprovider tests/schedules tests/engine tests/runner tests/test_plan.py tests/kernels tests/cache tests/test_arrows.py tests/measure/test_verify.py > /tmp/cpu.log 2>&1; echo rc $? >> /tmp/cpu.log) &
CPU=$!
taskset -c 0-3 timeout 100 python3 scratch_gap2.py > /tmp/gap.log 2>&1
timeout 40 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py -k "planned_too_far or upload" > /tmp/gpu.log 2>&1
wait $CPU
grep -v "^$\|loading\|CUDA graphs" /tmp/gap.log | cut -c1-330 | tail -60; echo ---- gpu; tail -8 /tmp/gpu.log; echo ---- cpu; tail -40 /tmp/cpu.log | cut -c1-250
cp /tmp/*.log $OUT/ 2>/dev/null
