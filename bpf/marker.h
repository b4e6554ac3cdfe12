/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by marker.bpf.c, src/sys/mark_maps.rs and src/sys/marker.rs. Any change to the key or value requires a new
 * version in the path of the pinned maps (PIN_DIR in src/sys/mark_maps.rs). */
#pragma once

#include <linux/types.h>

/* A flow in the direction of its outgoing packets. Ports are in network byte order. */
struct flow_key {
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero[3];
};

/* The mark of its packets, and how many were marked. */
struct flow_mark {
	__u32 label;	/* 20 bits, host byte order */
	__u32 tag;	/* experiment << 8 | activity: the 24 bits of the option */
	__u64 packets;	/* as sent on the wire: each segment of a GSO packet counts */
	__u64 bytes;	/* of frames, as counted by the kernel: the headers of a GSO packet count once */
};

/* Set before loading, so that the verifier removes unused code. */
struct settings {
	__u32 hop_by_hop;	/* add a Hop-by-Hop Options header */
	__u32 destination;	/* add a Destination Options header */
	__u32 match_all;	/* mark every IPv6 packet, using the entry with the all-zero key */
	__u32 check_mtu;	/* the kernel has bpf_check_mtu (5.12) */
	__u32 debug;		/* write to the trace pipe */
	__u32 pad;
	__u64 entropy_key;	/* with match_all, the key of the entropy bits computed in the program */
};

/* Why a packet of a known flow was sent unmarked; the index into the map `unmarked`. */
enum unmarked {
	UNMARKED_MTU,		/* it would exceed the MTU */
	UNMARKED_HEADERS,	/* fragment, jumbogram, or it already has a Hop-by-Hop header */
	UNMARKED_REFUSED,	/* the kernel cannot add the header: UDP GSO, inline VLAN */
	UNMARKED_REASONS,
};
