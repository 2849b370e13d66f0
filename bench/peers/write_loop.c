/* The limit: what is left of a broadcast when nothing is done but to call write.
 *
 *   write_loop PORT
 *
 * GET: a reader; it gets a stream's head. POST: every reader gets the same ready chunk, then the
 * POST its answer. Requests are small and arrive whole; none is looked at beyond its first letter.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_READERS 20000

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
static const char EVENT[] = /* 105 bytes of event, in a chunk */
    "69\r\ndata: ~0123456789012345678901234567890123456789012345678901234567890123456789012345"
    "67890123456789012345\n\n\r\n";
static const char ANSWER[] = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n";

static int readers[MOST_READERS];
static int reader_count;
static struct pollfd polled[1 + MOST_READERS]; /* the listener, then who may send a request */
static int polled_count = 1;

static void publish(void) {
    for (int i = 0; i < reader_count; i++) {
        if (send(readers[i], EVENT, sizeof EVENT - 1, 0) == (ssize_t)(sizeof EVENT - 1)) continue;
        close(readers[i]); /* it has left */
        readers[i--] = readers[--reader_count];
    }
}

/* Take one request; whether another may follow. */
static int take(int fd) {
    char request[8192];
    if (read(fd, request, sizeof request) > 0) {
        if (request[0] == 'P') {
            publish();
            if (send(fd, ANSWER, sizeof ANSWER - 1, 0) > 0) return 1;
        } else if (reader_count < MOST_READERS && send(fd, HEAD, sizeof HEAD - 1, 0) > 0) {
            readers[reader_count++] = fd;
            return 0;
        }
    }
    close(fd);
    return 0;
}

int main(int argc, char **argv) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (argc != 2) return 2;
    address.sin_port = htons(atoi(argv[1]));
    signal(SIGPIPE, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("write_loop");
        return 1;
    }
    polled[0] = (struct pollfd){.fd = listener, .events = POLLIN};
    while (poll(polled, polled_count, -1) > 0) {
        for (int i = polled_count - 1; i > 0; i--)
            if (polled[i].revents && !take(polled[i].fd)) polled[i] = polled[--polled_count];
        if (polled[0].revents) {
            int fd = accept(listener, NULL, NULL);
            if (fd >= 0 && polled_count <= MOST_READERS)
                polled[polled_count++] = (struct pollfd){.fd = fd, .events = POLLIN};
        }
    }
    return 1;
}
