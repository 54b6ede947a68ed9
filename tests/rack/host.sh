#!/bin/bash
# Process 1 of a host of the rack, in fresh pid, mount, net, uts and ipc namespaces.
# Arguments: NAME ADDRESS/BITS GATEWAY DISK SHARED [PLACE...]
#   DISK    the host's folder on the rack's tmpfs; what it writes is kept there
#   SHARED  a folder that all hosts see as /srv/shared
#   PLACE   folders that are not on the machine's root file system, or under /tmp
set -euo pipefail
name=$1 address=$2 gateway=$3 disk=$4 shared=$5
shift 5
root=$disk/root
mount --make-rprivate /
mkdir -p "$disk"/{upper,work,root,tmp,places}
chmod 1777 "$disk/tmp"
mount -t overlay overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" "$root"
# A token or a key of the machine's own user would be found by Ray and by ssh.
rm -rf "$root/root/.ray" "$root/root/.ssh" "$root/root/.aws"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
while read -r device major minor; do mknod -m 666 "$root/dev/$device" c "$major" "$minor"; done <<END
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
END
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
mount -t tmpfs -o size=1g,mode=1777 tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mkdir -p "$root/run/sshd" "$root/run/lock" "$root/srv/shared"
mount --bind "$disk/tmp" "$root/tmp"
mount --bind "$shared" "$root/srv/shared"
for place in "$@"; do
  own=$disk/places/$(echo "$place" | tr / _)
  mkdir -p "$own"/{upper,work} "$root$place"
  mount -t overlay overlay -o "lowerdir=$place,upperdir=$own/upper,workdir=$own/work" "$root$place"
done
cd "$root"
mkdir -p .old
pivot_root . .old
cd /
umount -l /.old
exec </dev/null
hostname "$name"
echo "$name" >/etc/hostname
export HOME=/root SHELL=/bin/bash PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ip link set lo up
for _ in $(seq 500); do
  ip link show eth0 >/dev/null 2>&1 && break
  sleep 0.02
done
ip addr add "$address" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
/usr/sbin/sshd -D -e -f /etc/rack/sshd_config 2>>/var/log/sshd.log &
until (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null; do sleep 0.02; done
touch /run/booted
# bash as process 1 reaps orphans and never ends.
while :; do
  sleep 3600 &
  wait $! || true
done
