#!/bin/bash
# Start a Ceph object gateway of one node (a real S3) on loopback, in about 20 seconds and 350 MB of memory:
#   ceph_up.sh FOLDER PORT ACCESS_KEY SECRET_KEY
# Needs the Debian packages radosgw, ceph-mon and ceph-osd. To end it: for p in FOLDER/*.pid; do kill $(cat $p); done
set -euo pipefail
folder=$1 port=$2 access=$3 secret=$4
mkdir -p "$folder"/crash "$folder"/mon.a "$folder"/osd.0
cd "$folder"
cluster=$(cat /proc/sys/kernel/random/uuid)
disk=$(cat /proc/sys/kernel/random/uuid)
monitor="[v2:127.0.0.1:13300/0,v1:127.0.0.1:16789/0]"
cat > ceph.conf <<END
[global]
fsid = $cluster
mon_initial_members = a
mon_host = $monitor
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_max_pg_per_osd = 1000
run_dir = $folder
admin_socket = $folder/\$name.asok
log_file = $folder/\$name.log
pid_file = $folder/\$name.pid
crash_dir = $folder/crash
keyring = $folder/keyring
[mon]
mon_data = $folder/mon.\$id
mon_data_avail_crit = 1
auth_allow_insecure_global_id_reclaim = false
[osd]
osd_data = $folder/osd.\$id
osd_objectstore = bluestore
bluestore_block_size = 10737418240
osd_memory_target = 1073741824
osd_class_dir = $(dirname "$(find /usr/lib /usr/lib64 -name libcls_rgw.so 2>/dev/null | head -n 1)")
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw_thread_pool_size = 16
END
ceph() { timeout 60 ceph -c ceph.conf "$@"; }

ceph-authtool -C keyring --gen-key -n mon. --cap mon 'allow *' > /dev/null
for name in client.admin osd.0 client.rgw.a; do
    ceph-authtool keyring --gen-key -n $name --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
done
monmaptool --create --addv a "${monitor//\/0/}" --fsid "$cluster" monmap > /dev/null
ceph-mon -c ceph.conf --mkfs -i a --monmap monmap --keyring keyring
ceph-mon -c ceph.conf -i a
sleep 2
ceph osd new "$disk" > /dev/null
ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid "$disk" > /dev/null 2>&1
ceph-osd -c ceph.conf -i 0 > /dev/null 2>&1
ceph osd crush add osd.0 1.0 root=default host=here > /dev/null 2>&1
timeout 120 radosgw-admin -c ceph.conf -n client.rgw.a user create --uid=test --display-name=test \
    --access-key="$access" --secret="$secret" > /dev/null 2>&1
radosgw -c ceph.conf -n client.rgw.a
for _ in $(seq 120); do
    (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null && exit 0
    sleep 0.5
done
echo "no answer on port $port" >&2
exit 1
